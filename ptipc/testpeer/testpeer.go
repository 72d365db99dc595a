// Package testpeer finds the real programs that tests talk to.
//
//	curl := testpeer.Need(t, "curl")
//	out, err := exec.CommandContext(t.Context(), curl, "--version").Output()
package testpeer

import (
	"os"
	"os/exec"
	"testing"
)

// NoSkip is the environment variable that turns a missing peer into a failure:
// continuous integration sets it, a developer's laptop need not.
const NoSkip = "PTIPC_NO_SKIP"

// packages names the Debian package of a program where it is not its own name.
var packages = map[string]string{
	"nginx":        "nginx-light",
	"sshd":         "openssh-server",
	"ssh":          "openssh-client",
	"scp":          "openssh-client",
	"nc.openbsd":   "netcat-openbsd",
	"proxychains4": "proxychains4",
	"ip":           "iproute2",
	"nft":          "nftables",
	"dig":          "bind9-dnsutils",
	"unshare":      "util-linux",
	"prove":        "perl",
	"tor-gencert":  "tor",
	"ss-local":     "shadowsocks-libev",
	"ss-server":    "shadowsocks-libev",
	"obfs-local":   "simple-obfs",
	"obfs-server":  "simple-obfs",

	"ss-v2ray-plugin": "shadowsocks-v2ray-plugin",
}

// Need returns the path of a program. A missing one skips the test and says what
// to install, or fails it where skipping is forbidden.
func Need(t testing.TB, program string) string {
	t.Helper()
	if path, err := exec.LookPath(program); err == nil {
		return path
	}
	for _, dir := range []string{"/usr/sbin", "/sbin", "/usr/local/sbin"} {
		if path, err := exec.LookPath(dir + "/" + program); err == nil {
			return path
		}
	}
	pkg := packages[program]
	if pkg == "" {
		pkg = program
	}
	Skip(t, program+" is not installed; on Debian: apt-get install "+pkg)
	return ""
}

// Skip skips the test for a reason that lies with the machine, or fails it where
// skipping is forbidden.
func Skip(t testing.TB, reason string) {
	t.Helper()
	if os.Getenv(NoSkip) != "" {
		t.Fatal(reason + " (" + NoSkip + " is set)")
	}
	t.Skip(reason)
}

// NeedPython returns a Python 3 that can import the module of a Debian package.
func NeedPython(t testing.TB, module, pkg string) string {
	t.Helper()
	for _, python := range []string{"python3", "/usr/bin/python3"} {
		if path, err := exec.LookPath(python); err == nil && exec.CommandContext(t.Context(), path, "-c", "import "+module).Run() == nil {
			return path
		}
	}
	Skip(t, "no python3 here imports "+module+"; on Debian: apt-get install "+pkg)
	return ""
}
