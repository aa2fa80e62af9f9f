"""What a module computes, read from its own forward by torch.fx. No tensor, no kernel."""
