"""What generators and their critics are trained with: losses, penalties, and layers that are 1-Lipschitz."""
