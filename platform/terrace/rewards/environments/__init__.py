"""Environments that come with Terrace: see `rewards.environment` for the contract."""
