"""The demonstration corpus of drawn scenes and its gallery."""
