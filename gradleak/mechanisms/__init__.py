"""What a defense and the attack that answers it share."""
