"""What flows: plain values, and the arithmetic on them. Imports nothing of gradwatch but itself."""
