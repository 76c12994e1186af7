"""ddiff on Kubernetes: the manifests that KubeRay reads, and the image that they name."""
