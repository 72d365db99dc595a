package conformance_test

import (
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"

	"pthost/ptipc"
	"pthost/ptipc/conformance"
)

// managedSubject is a child with a fault, of a dialect for managed transports.
func managedSubject(t *testing.T, dialect, role, fault string) conformance.Subject {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	s := conformance.Subject{
		Path: self, Args: []string{asPT1, fault}, Dialect: dialect, Role: role, Free: true,
		Config: ptipc.Opaque(`{"transports":{"faulty":{}}}`),
	}
	if dialect == conformance.PT2 {
		s.Args[0] = asPT2
	}
	if role == conformance.Server {
		s.Config = ptipc.Opaque(`{"transports":{"faulty":{"listen":"127.0.0.1:0"}}}`)
	}
	return s
}

func TestManagedWithoutFault(t *testing.T) {
	t.Parallel()
	for _, dialect := range []string{conformance.PT1, conformance.PT2} {
		for _, role := range []string{conformance.Client, conformance.Server} {
			t.Run(dialect+" "+role, func(t *testing.T) {
				t.Parallel()
				s := managedSubject(t, dialect, role, "")
				if role == conformance.Client {
					s.Settings = ptipc.Opaque(`{"key":"a=b;c\\d","more":[1,true]}`)
				}
				report := run(t, s, conformance.Options{Patience: patience, Strict: true, Slow: !testing.Short()})
				want(t, report, conformance.FellShort)
				var notRun []string
				if dialect == conformance.PT2 && role == conformance.Server {
					notRun = []string{"PT1-1/bad-options"}
				}
				want(t, report, conformance.NotRun, notRun...)
				if !report.OK() {
					t.Error("the report is not OK")
				}
			})
		}
	}
}

var (
	// What both roles can get wrong.
	managedFaults = []fault{
		{"pt: takes its own version alone", []string{"PT1-1/version-list"}},
		{"pt: takes any version", []string{"PT1-1/no-version"}},
		{"pt: needs no version", []string{"PT1-1/without-version"}},
		{"pt: needs no transports", []string{"PT1-1/without-transports"}},
		{"VERSION late", []string{"PT1-20/version-first"}},
		{"pt: is confused by other names", []string{"PT1-21/unknown-transport"}},
		{"ignores the end of stdin", []string{"PT1-29/stdin", "PT1-29/open-connection"}},
		{"pt: always ends with stdin", []string{"PT1-29/not-asked"}},
		{"ignores SIGTERM", []string{"PT1-29/sigterm", "PT1-29/open-connection"}},
		{"pt: ignores SIGINT", []string{"PT1-29/sigint"}},
		{"pt: does not end while it was used", []string{"PT1-29/open-connection"}},
		{"exits with 1 at the end", []string{"PT1-29/stdin", "PT1-29/sigterm", "PT1-29/open-connection"}},
		{"leaves a file outside", []string{"LIFE-8/files", "LIFE-8/watched"}},
		{"keeps a file elsewhere for a moment", []string{"LIFE-8/watched"}},
		{"pt: needs the state location", []string{"PT1-30/created"}},
		{"listens everywhere", []string{"LIFE-11/loopback", "LIFE-11/watched"}},
		{"listens everywhere in the end", []string{"LIFE-11/watched"}},
		{"pt: writes UTF-8", []string{"PT1-20/lines"}},
		{"LOG with a bad escape", []string{"LINE-9/log"}},
		{"STATUS with an open quote", []string{"LINE-10/status"}},
	}
	managedClientFaults = []fault{
		{neverReady, []string{
			"LIFE-1/ready", "PT1-1/version-list", "PT1-1/without-transports", "PT1-20/version-first", "PT1-21/unknown-transport", "PT1-24/answered",
			"PT1-24/unusable", "PROXY-1/unreachable", "PT1-29/not-asked", "PT1-30/created",
		}},
		{"pt: gives up silently", []string{"PT1-1/no-version", "PT1-1/without-version", "PT1-1/without-transports", "PT1-24/unusable"}},
		{"pt: lives on after an error", []string{"PT1-1/no-version", "PT1-1/without-version", "PT1-1/without-transports", "PT1-24/unusable"}},
		{"CMETHOD of another protocol", []string{"PT1-8/form"}},
		{"announces a public address", []string{"LINE-5/address"}},
		{"done before it listens", []string{"LINE-7/listening"}},
		{"announces after the end", []string{"LINE-7/last"}},
		{"pt: knows no method but 00", []string{"PT1-22/each-alone", "PT1-22/password-first", "PT1-3/username", "PT1-3/both", "PT1-2/escapes", "PT1-2/any-escape", "PT1-2/refused", "SOCKS-22/descriptors"}},
		{"prefers no settings", []string{"PT1-22/password-first"}},
		{"takes any method", []string{"PT1-22/none-known"}},
		{"pt: takes the NUL for an argument", []string{"PT1-3/username", "PT1-2/escapes", "PT1-2/any-escape"}},
		{"pt: takes no long arguments", []string{"PT1-3/both"}},
		{"pt: does not know escapes", []string{"PT1-2/escapes"}},
		{"pt: knows three escapes", []string{"PT1-2/any-escape"}},
		{"pt: takes any arguments", []string{"PT1-2/refused"}},
		{"takes the greeting for one segment", []string{"SOCKS-5/byte-by-byte"}},
		{"takes no pipelining", []string{"SOCKS-5/one-segment"}},
		{"changes full buffers", []string{"PT1-22/bytes"}},
		{"pt: goes elsewhere", []string{"PT1-23/destination", "SOCKS-13/name"}},
		{"takes no names", []string{"SOCKS-13/name", "PROXY-3/name"}},
		{"pt: knows no failure", []string{"PT1-22/failure", "ERR-1/refused", "PROXY-1/failing", "PROXY-1/unreachable", "PROXY-3/password"}},
		{"takes any command", []string{"SOCKS-7/commands"}},
		{"does not tell address types", []string{"SOCKS-7/address-types"}},
		{"tells its bound address", []string{"SOCKS-8/bound-address"}},
		{"one handshake at a time", []string{"SOCKS-9/others-go-on"}},
		{"serves a hundred", []string{"SOCKS-10/many"}},
		{"stops accepting without descriptors", []string{"SOCKS-10/out-of-descriptors"}},
		{"leaks descriptors", []string{"SOCKS-22/descriptors"}},
		{"does not see a hang-up", []string{"SOCKS-14/hang-up", "SOCKS-14/end-without-early-data"}},
		{"takes a half-close for a hang-up", []string{"SOCKS-14/end-after-early-data"}},
		{"ends both directions at once", []string{"SOCKS-14/end-after-early-data", "SOCKS-15/client-first", "SOCKS-15/far-end-first"}},
		{"hides a reset", []string{"SOCKS-15/broken-far-end", "SOCKS-15/broken-client"}},
		{"lets everybody in", []string{"SOCKS-17/other-user"}},
		{"general failures alone", []string{"ERR-1/refused"}},
		{"no PROXY DONE", []string{"PT1-24/answered"}},
		{"takes any proxy", []string{"PT1-24/unusable"}},
		{"goes around the proxy", []string{"PROXY-1/not-around", "PROXY-1/failing", "PROXY-1/unreachable", "PROXY-3/name", "PROXY-3/password", "PROXY-1/nothing-around", "PROXY-3/nothing-looked-up"}},
		{"looks names up", []string{"PROXY-3/name", "PROXY-3/nothing-looked-up"}},
		{"looks names up beside", []string{"PROXY-3/nothing-looked-up"}},
		{"tells home", []string{"PROXY-1/nothing-around"}},
		{"keeps the password from the proxy", []string{"PROXY-3/password"}},
		{"tells the password of the proxy", []string{"PROXY-3/secret"}},
		{"pt: does not know source addresses", []string{"PT1-24/source-address"}},
	}
	managedServerFaults = []fault{
		{neverReady, []string{
			"LIFE-1/ready", "PT1-1/version-list", "PT1-1/without-transports", "PT1-1/no-cookie", "PT1-1/bad-options", "PT1-20/version-first",
			"PT1-21/unknown-transport", "PT1-25/kept", "PT1-26/address", "PT1-28/orport", "PT1-29/not-asked", "PT1-30/created",
		}},
		{"pt: gives up silently", []string{"PT1-1/no-version", "PT1-1/without-version", "PT1-1/without-transports", "PT1-1/no-cookie", "PT1-1/bad-options"}},
		{"pt: lives on after an error", []string{"PT1-1/no-version", "PT1-1/without-version", "PT1-1/without-transports", "PT1-1/no-cookie", "PT1-1/bad-options"}},
		{"pt: needs no cookie", []string{"PT1-1/no-cookie"}},
		{"pt: takes any options", []string{"PT1-1/bad-options"}},
		{"pt: listens where it likes", []string{"PT1-26/address"}},
		{"pt: ARGS without a value", []string{"PT1-9/form"}},
		{"pt: ARGS that need escapes", []string{"PT1-9/plain"}},
		{"announces after the end", []string{"SRV-1/last"}},
		{"pt: forgets its key", []string{"PT1-25/kept"}},
		{"pt: hides the client's address", []string{"PT1-28/extended"}},
		{"pt: speaks to the plain ORPort", []string{"PT1-28/orport"}},
		{"pt: sends before OKAY", []string{"PT1-28/before-okay"}},
		{"pt: does not understand DENY", []string{"PT1-28/denied"}},
		{"pt: keeps clients that nobody takes", []string{"PT1-28/denied", "PT1-10/forged"}},
		{"pt: believes any parent", []string{"PT1-10/forged"}},
		{"pt: reads beyond OKAY", []string{"PT1-11/not-beyond"}},
		{"pt: knows every answer", []string{"PT1-11/unknown-answer"}},
		{"pt: brings one after the other", []string{"PT1-28/others-go-on"}},
		{"hides a reset", []string{"PT1-28/broken"}},
		{"ends both directions at once", []string{"SRV-3/half-close"}},
	}
	// What is not so in the dialect PT2, of clients.
	dispatcherFaults = []fault{
		{"does not know 0x09 alone", []string{"PT1-15/each-alone", "PT1-15/no-reply-between", "SOCKS-6/not-json", "SOCKS-3/promised", "SOCKS-22/descriptors"}},
		{"prefers no settings", []string{"PT1-15/settings-win"}},
		{"takes any method", []string{"PT1-15/none-known"}},
		{"replies to settings", []string{"PT1-15/no-reply-between"}},
		{"takes what is no object", []string{"SOCKS-6/not-json"}},
		{"takes any length of settings", []string{"SOCKS-3/promised"}},
	}
	// With these no case can hold that connects.
	managedAlone = []string{neverReady, "pt: goes elsewhere"}
	// With these each case waits in the end, so that they are held against few.
	managedStubborn = []string{"ignores the end of stdin", "ignores SIGTERM", "pt: does not end while it was used", "pt: lives on after an error", "listens everywhere in the end"}
	// These wait for limits of ten seconds.
	managedSlowFaults = map[string][]fault{
		conformance.Client: {
			{"waits forever", []string{"SOCKS-9/silence-ends"}},
			{"pt: waits for ever in the end", []string{"PT1-29/lingering"}},
		},
		conformance.Server: {{"pt: waits for ever in the end", []string{"PT1-29/lingering"}}},
	}
)

// managedMatrix has the faults of each dialect and role. What PT2 shares with PT1 is shown there.
func managedMatrix() map[[2]string][]fault {
	return map[[2]string][]fault{
		{conformance.PT1, conformance.Client}: slices.Concat(managedFaults, managedClientFaults),
		{conformance.PT1, conformance.Server}: slices.Concat(managedFaults, managedServerFaults),
		{conformance.PT2, conformance.Client}: dispatcherFaults,
	}
}

// Each fault makes the cases fall short that are about it, and no other.
func TestManagedFaults(t *testing.T) {
	t.Parallel()
	needLinux(t)
	type outcome struct {
		fells []string
		conformance.Report
		err error
	}
	outcomes := map[string]*outcome{}
	// As in TestFaults, and side by side, since these wait even more.
	free := make(chan struct{}, 12*runtime.GOMAXPROCS(0))
	var runs sync.WaitGroup
	for of, faults := range managedMatrix() {
		for _, f := range faults {
			o := &outcome{fells: f.fells}
			outcomes[of[0]+" "+of[1]+" "+f.name] = o
			s := managedSubject(t, of[0], of[1], f.name)
			// What it must not make fall short is looked at in one role.
			shared := slices.ContainsFunc(managedFaults, func(m fault) bool { return m.name == f.name })
			free <- struct{}{}
			runs.Go(func() {
				defer func() { <-free }()
				if o.Report, o.err = impatiently(t.Context(), s, f); o.err != nil || !wholeMatrix() || shared && of[1] == conformance.Server || slices.Contains(managedAlone, f.name) {
					return
				}
				var rest conformance.Report
				rest, o.err = conformance.Run(t.Context(), s, managedRest(of, f))
				o.Results = append(o.Results, rest.Results...)
			})
		}
	}
	runs.Wait()
	for name, o := range outcomes {
		t.Run(name, func(t *testing.T) {
			if o.err != nil {
				t.Fatal(o.err)
			}
			want(t, o.Report, conformance.FellShort, o.fells...)
		})
	}
}

// managedRest are the cases that a fault must not make fall short.
func managedRest(of [2]string, f fault) conformance.Options {
	o := conformance.Options{Patience: patience}
	stubborn := slices.Contains(managedStubborn, f.name)
	if stubborn {
		o.Patience = impatience
	}
	o.Pattern = exactly(slices.DeleteFunc(caseNames(of[0], of[1]), func(name string) bool {
		return slices.Contains(f.fells, name) || stubborn && !strings.HasPrefix(name, "PT1-29/") && !strings.HasPrefix(name, "LIFE-1")
	}))
	return o
}

func TestManagedFaultsSlow(t *testing.T) {
	t.Parallel()
	if testing.Short() {
		t.Skip("-short is set, and this waits for limits of ten seconds")
	}
	for role, faults := range managedSlowFaults {
		for _, f := range faults {
			t.Run(role+" "+f.name, func(t *testing.T) {
				t.Parallel()
				report := run(t, managedSubject(t, conformance.PT1, role, f.name), conformance.Options{Slow: true, Pattern: exactly(f.fells)})
				want(t, report, conformance.FellShort, f.fells...)
			})
		}
	}
}

func caseNames(dialect, role string) []string {
	var names []string
	for _, c := range conformance.Cases(dialect) {
		if c.Role == role {
			names = append(names, c.Name)
		}
	}
	return names
}

// Every case is shown to fall short for some fault, of the dialect or of PT1.
func TestEveryManagedCaseCanFallShort(t *testing.T) {
	fells := map[string]bool{}
	for of, faults := range managedMatrix() {
		for _, f := range slices.Concat(faults, managedSlowFaults[of[1]]) {
			for _, name := range f.fells {
				fells[of[1]+" "+name] = true
			}
		}
	}
	cases := map[string]bool{}
	for _, dialect := range []string{conformance.PT1, conformance.PT2} {
		own := map[string]bool{}
		for _, c := range conformance.Cases(dialect) {
			name := c.Role + " " + c.Name
			if own[name] {
				t.Errorf("two cases of %s have the name %s", dialect, name)
			}
			own[name], cases[name] = true, true
			if !fells[name] {
				t.Errorf("no fault makes %s of %s fall short", name, dialect)
			}
			if !strings.HasPrefix(c.Name, c.Clause+"/") {
				t.Errorf("%s is not named by its clause %s", c.Name, c.Clause)
			}
		}
	}
	for name := range fells {
		if !cases[name] {
			t.Errorf("no case has the name %s", name)
		}
	}
}
