"""What a stage would take, by counting its work."""
