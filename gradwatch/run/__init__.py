"""`gradwatch run`: watches whatever an unmodified program trains."""
