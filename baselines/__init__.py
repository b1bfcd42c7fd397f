"""The systems CrossPool is compared with: siblings behind one interface, none importing another or crosspool."""
