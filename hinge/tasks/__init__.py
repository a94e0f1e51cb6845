"""What is done with an encoder of histology: gene prediction end to end, dense maps, probes, clusters."""
