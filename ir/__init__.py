"""What a program is: encodings, numerics, operators, capture, edit, match, text, verifier. Imports neither passes nor backends."""
