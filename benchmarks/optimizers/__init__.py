"""Every optimizer there is, trained with and without gradwatch: what changes, and whether what is told is true."""
