"""Several processes, one per device, joined by torch.distributed."""
