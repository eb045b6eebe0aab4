"""The bundled demo model: a tiny trained checkpoint in the real layout, and all that made it."""
