"""The Kubernetes operator of Terrace: thin kopf handlers around a pure reconcile."""
