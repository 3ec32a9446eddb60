"""Files of control networks and adapters."""
