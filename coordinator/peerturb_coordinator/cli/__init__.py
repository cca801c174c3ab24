"""Commands of the coordinator; each module is imported when its command is asked for."""
