from orion_triage.cli import main

main()
