"""Views of a picture: what chance decides of them, and how they are made."""
