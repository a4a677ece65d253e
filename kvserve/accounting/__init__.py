"""How many blocks a request holds, by arithmetic on lengths, and whether a pool can ever hold it."""
