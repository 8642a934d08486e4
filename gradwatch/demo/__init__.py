"""`gradwatch demo`: sick networks beside healthy ones."""
