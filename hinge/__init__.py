"""hinge: spatial gene expression from histology, in draws."""
