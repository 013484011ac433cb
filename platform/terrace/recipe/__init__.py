"""What to run: the typed recipe, its loading and its errors."""
