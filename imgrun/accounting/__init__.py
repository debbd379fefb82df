"""What a job uses, and which limit it ran into."""
