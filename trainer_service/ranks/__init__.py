"""A run on several processes, its ranks: who starts them, how they find one another, and how all of them end."""
