package proc

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"pthost/ptipc"
	"pthost/ptipc/testpeer"
)

// A sandboxed child has its directory, what the system has for every program, and what
// it was allowed, and nothing else (LIFE-12).
func TestSandbox(t *testing.T) {
	if !sandboxWorks() {
		testpeer.Skip(t, "this kernel has no Landlock")
	}
	at := func(name, text string) string {
		path := filepath.Join(t.TempDir(), name)
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		return path
	}
	secret, readable, writable := at("secret", "s"), at("readable", "r"), at("writable", "w")
	try := func(script string, args ...string) *child {
		return start(t, Spec{
			Launcher: self("launcher"), Dir: t.TempDir(),
			Sandbox: &Sandbox{Read: []string{readable, "/no/such/file"}, Write: []string{filepath.Dir(writable)}},
		}, append([]string{"/bin/sh", "-c", "try() { if \"$@\" >/dev/null 2>&1; then echo yes; else echo no; fi; }\n" + script, "sh"}, args...)...)
	}
	for _, test := range []struct{ name, script, want string }{
		{"its directory", `echo x >a && mkdir d && mv a d/b && try cat d/b`, "yes"},
		{"a file that is allowed", `try cat "$2"`, "yes"},
		{"writing what it may read", `try sh -c 'echo x >>"$1"' sh "$2"`, "no"},
		{"a directory to write in", `try sh -c 'echo x >"$1".new && rm "$1"' sh "$3"`, "yes"},
		{"a file of the user's", `try cat "$1"`, "no"},
		{"a file of the user's, by a child of its own", `try sh -c 'cat "$1"' sh "$1"`, "no"},
		{"a list of the user's files", `try ls "${1%/*}"`, "no"},
		{"a new file beside them", `try touch "$1.new"`, "no"},
		{"secrets of the machine", `try cat /etc/shadow`, "no"},
		{"another process's environment", `try cat /proc/$PPID/../1/environ`, "no"},
		{"names and numbers of users", `try cat /etc/passwd`, "yes"},
		{"certificates", `try ls /etc/ssl/certs`, "yes"},
		{"nothing", `try sh -c 'echo x >/dev/null && cat /dev/null'`, "yes"},
		{"itself", `try cat /proc/self/status`, "yes"},
	} {
		t.Run(test.name, func(t *testing.T) {
			try(test.script, secret, readable, writable).expect(test.want)
		})
	}
	// Without the sandbox it is the script that says yes.
	start(t, Spec{Launcher: self("launcher")}, "/bin/sh", "-c", `cat "$0" >/dev/null && echo yes`, secret).expect("yes")

	e := try(`cat "$1"`, secret).exit()
	for _, part := range []string{"sandbox", readable, filepath.Dir(writable)} {
		if !strings.Contains(e.Error(), part) {
			t.Errorf("a child that was refused a file ended with %q, without %q", e, part)
		}
	}
	// It runs under the sandbox of its own executable alone.
	if _, err := Start(t.Context(), Spec{Path: secret, Launcher: self("launcher"), Sandbox: &Sandbox{}}); !errors.Is(err, os.ErrPermission) {
		t.Errorf("a file that is not executable gave %v", err)
	}
}

// The rest of what a child may use (LIFE-13).
func TestLimits(t *testing.T) {
	limits := Limits{Descriptors: 50, Memory: 300 << 20, Processes: 4000}
	c := start(t, Spec{Launcher: self("launcher"), Limits: limits},
		"/bin/sh", "-c", "sh -c 'ulimit -Hn; ulimit -Sn; ulimit -Hd; grep ^Max.processes /proc/self/limits'")
	c.expect("50")
	c.expect("50")
	c.expect("307200")
	if got := strings.Fields(c.line()); len(got) < 4 || got[2] != "4000" || got[3] != "4000" {
		t.Errorf("the limit of processes is %q", got)
	}
	// The launcher is not held to them.
	c = start(t, Spec{Launcher: self("launcher"), Limits: limits}, "/bin/sh", "-c", "grep ^Max.open /proc/$PPID/limits")
	if got := strings.Fields(c.line()); len(got) < 4 || got[4] == "50" {
		t.Errorf("the launcher's limit is %q", got)
	}
	e := start(t, Spec{Launcher: self("launcher"), Limits: Limits{Memory: 50 << 20}}, "/bin/sh", "-c", "head -c 100M /dev/zero | tail -c 100M | wc -c").exit()
	if text := strings.Join(e.Stderr, " "); !strings.Contains(text, "memory") {
		t.Errorf("too much memory gave %v", e)
	}
}

// They hold for what a child starts first, too, whoever it runs as (LIFE-13).
func TestLimitsFromTheBeginning(t *testing.T) {
	users := []*Credential{nil}
	if os.Geteuid() == 0 {
		users = append(users, &Credential{UID: 65534, GID: 65534})
	}
	for _, user := range users {
		for range 20 {
			start(t, Spec{Launcher: self("launcher"), Limits: Limits{Descriptors: 50}, Sandbox: &Sandbox{}, Credential: user}, "/bin/sh", "-c", "(ulimit -Hn)").expect("50")
		}
	}
	_, err := Start(t.Context(), Spec{Path: "/bin/true", Launcher: self("launcher"), Limits: Limits{Descriptors: 1 << 40}})
	if err == nil || !strings.Contains(err.Error(), "1099511627776 descriptors") || !strings.Contains(err.Error(), "lower it") {
		t.Errorf("a limit that is higher than there is gave %v", err)
	}
	// One that cannot be started is no other thing with limits than without.
	if _, err := Start(t.Context(), Spec{Path: t.TempDir(), Launcher: self("launcher"), Limits: Limits{Descriptors: 50}}); !errors.Is(err, os.ErrPermission) || !strings.Contains(err.Error(), "directory") {
		t.Errorf("a directory gave %v", err)
	}
}

func TestRestrictionsNeedALauncher(t *testing.T) {
	for _, spec := range []Spec{{Sandbox: &Sandbox{}}, {Limits: Limits{Descriptors: 100}}} {
		spec.Path = "/bin/true"
		if _, err := Start(t.Context(), spec); err == nil || !strings.Contains(err.Error(), "Launcher") {
			t.Errorf("without a launcher: %v", err)
		}
	}
	spec := Spec{Path: "/bin/true", Launcher: self("launcher"), Sandbox: &Sandbox{Read: []string{"x"}}, Log: slog.New(slog.DiscardHandler)}
	if _, err := Start(t.Context(), spec); err == nil || !strings.Contains(err.Error(), `"x"`) {
		t.Errorf("a relative path: %v", err)
	}
}

func TestExplain(t *testing.T) {
	if got := (*Sandbox)(nil).Explain("permission denied"); got != "" {
		t.Errorf("no sandbox explains %q", got)
	}
	if got := (&Sandbox{}).Explain(ptipc.ExitUsage.Error()); got != "" {
		t.Errorf("another error is explained by %q", got)
	}
	if got := (&Sandbox{}).Explain("open /x: Permission denied"); !strings.Contains(got, "read nothing") {
		t.Errorf("a refusal is explained by %q", got)
	}
}
