"""The victim's side: clients that train and send."""
