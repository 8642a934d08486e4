"""Stock models of public libraries, trained from their configurations: what gradwatch says while they learn."""
