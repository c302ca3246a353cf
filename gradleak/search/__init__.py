"""What optimisation attacks are made of: labels, penalties, parametrisations, generators."""
