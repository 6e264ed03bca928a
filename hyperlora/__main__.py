from hyperlora.cli import main

main()
