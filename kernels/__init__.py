"""The divergence op: KL between the outputs of two hidden states under a head, without an N x V tensor (installed as `kvopt.kernels`)."""
