"""What a checkpoint is made of: saving and continuing a job, and what is checked before."""
