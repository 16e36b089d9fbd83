"""The generation engine: one thread and fixed slots, in which many streams decode together."""
