"""Networks and generators that are trained here."""
