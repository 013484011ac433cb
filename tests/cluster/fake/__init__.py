"""A small Kubernetes for tests: API server, garbage collector, KubeRay and Kueue, as far as the operator can tell."""
