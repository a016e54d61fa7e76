"""Reading users' files, turning them into tensors, and giving them out in batches."""
