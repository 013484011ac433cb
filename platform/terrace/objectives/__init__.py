"""What a step optimises: one file per objective."""
