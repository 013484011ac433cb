"""Modules that transformers has no class for: one file each, plain PyTorch, nothing of Terrace in them, because an export copies them."""
