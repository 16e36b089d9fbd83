"""The generation engine: one thread, fixed slots, many streams decoding together."""
