"""Training in several processes, one per device, with torch.distributed."""
