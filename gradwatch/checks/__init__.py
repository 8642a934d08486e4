"""One batch, before anything is trained: check, horizon, and the assertions made of them."""
