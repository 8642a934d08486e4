"""Captured sequences -> gradients per timestep, and how far back a module can see."""
