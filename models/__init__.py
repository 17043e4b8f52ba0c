"""Plain single-device models: the specification that every layout must reproduce."""
