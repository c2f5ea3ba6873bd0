"What several tests share. Each name is defined once; `tests/README.md` says what lies where."
