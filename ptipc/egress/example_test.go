package egress_test

import (
	"context"
	"errors"
	"fmt"

	"pthost/ptipc"
	"pthost/ptipc/egress"
)

func ExamplePolicy_Dialer() {
	var policy egress.Policy
	err := ptipc.Opaque(`{"allow": ["*.example.org:443", "10.1.0.0/16:80-90"]}`).Decode(&policy)
	if err != nil {
		fmt.Println(err)
		return
	}
	dial := policy.Dialer(nil)
	_, err = dial(context.Background(), "tcp", "10.2.0.1:80")
	fmt.Println(errors.Is(err, ptipc.ErrNotAllowed))
	fmt.Println(err)
	// Output:
	// true
	// egress: "10.2.0.1:80": dial tcp 10.2.0.1:80: the address is 10.2.0.1: it is private (RFC 1918), and no rule names it; add "10.2.0.1:80" to the list of what is allowed
}
