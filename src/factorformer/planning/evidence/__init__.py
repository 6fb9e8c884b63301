"""What plans by loss are made of: error curves, sensitivities, times."""
