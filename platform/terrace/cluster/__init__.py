"""Launchers: this process, Ray Jobs, Kubernetes."""
