"""Rule rewards, reward models, the router, the sandbox and the service."""
