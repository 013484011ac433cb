"""The state machine over stages, its journal and its commands."""
