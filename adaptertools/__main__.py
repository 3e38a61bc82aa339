from adaptertools.cli import main

main()
