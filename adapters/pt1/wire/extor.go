package wire

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
)

// CookieSize is the number of secret bytes in a cookie (PT1-10).
const CookieSize = 32

// A Cookie is the secret that both ends of an Extended ORPort share.
type Cookie [CookieSize]byte

// String hides the secret from logs.
func (Cookie) String() string { return "***" }

// GoString hides the secret from %#v.
func (Cookie) GoString() string { return "***" }

const cookieHeader = "! Extended ORPort Auth Cookie !\x0a"

// Append appends the content of the cookie's file to b.
func (c Cookie) Append(b []byte) []byte { return append(append(b, cookieHeader...), c[:]...) }

// ParseCookie reads the content of a cookie's file. Errors repeat nothing of it.
func ParseCookie(b []byte) (Cookie, error) {
	var c Cookie
	if len(b) != len(cookieHeader)+CookieSize || string(b[:len(cookieHeader)]) != cookieHeader {
		return c, fmt.Errorf("this is no Extended ORPort cookie: %d bytes behind the header %q are wanted, and nothing else (PT1-10)", CookieSize, cookieHeader[:len(cookieHeader)-1])
	}
	copy(c[:], b[len(cookieHeader):])
	return c, nil
}

// ReadCookie reads the file of a cookie.
func ReadCookie(path string) (Cookie, error) {
	f, err := os.Open(path)
	if err != nil {
		return Cookie{}, fmt.Errorf("the Extended ORPort cookie: %w", err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, 1024))
	if err != nil {
		return Cookie{}, fmt.Errorf("the Extended ORPort cookie: %w", err)
	}
	c, err := ParseCookie(b)
	if err != nil {
		return Cookie{}, fmt.Errorf("%s: %w", path, err)
	}
	return c, nil
}

// WriteCookie makes a new cookie and its file, in place of one that is there, for
// its owner alone (PT1-10). uid and gid are the owner's, -1 for this process's own.
func WriteCookie(path string, uid, gid int) (Cookie, error) {
	var c Cookie
	_, _ = rand.Read(c[:]) // it never fails
	if err := WritePrivate(path, c.Append(nil), uid, gid); err != nil {
		return Cookie{}, fmt.Errorf("writing the Extended ORPort cookie: %w", err)
	}
	return c, nil
}

// WritePrivate writes a file for its owner alone, in place of one that is there. uid
// and gid are as with [WriteCookie].
func WritePrivate(path string, content []byte, uid, gid int) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	// O_EXCL: the directory may belong to a less trusted user, and what he puts there
	// meanwhile must not be written to, or given to him.
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	if err == nil && (uid >= 0 || gid >= 0) {
		err = f.Chown(uid, gid)
	}
	return errors.Join(err, f.Close())
}

// A Client is what a server says of a connection on an Extended ORPort.
type Client struct {
	Addr      string // ip:port of the client as the wire saw it; "" when the server did not say
	Transport string // the name of the transport; "" when the server did not say
}

// The commands and answers of an Extended ORPort (PT1-11).
const (
	cmdDone      = 0x0000
	cmdUserAddr  = 0x0001
	cmdTransport = 0x0002
	cmdOkay      = 0x1000
	cmdDeny      = 0x1001
)

const (
	authSafeCookie = 0x01
	nonceSize      = 32
	// maxCommands bounds what comes before DONE; two commands have a meaning.
	maxCommands = 32
	// maxBody is the most that a command with a meaning needs: an address or a name.
	maxBody = 256
)

var (
	// ErrDenied says that the other end of an Extended ORPort refused.
	ErrDenied = errors.New("refused by the Extended ORPort")
	// ErrForged says that the other end of an Extended ORPort does not have the cookie.
	ErrForged = errors.New("the other end does not have the cookie of the Extended ORPort")
)

func serverHash(c Cookie, clientNonce, serverNonce []byte) []byte {
	return cookieHash(c, "ExtORPort authentication server-to-client hash", clientNonce, serverNonce)
}

func clientHash(c Cookie, clientNonce, serverNonce []byte) []byte {
	return cookieHash(c, "ExtORPort authentication client-to-server hash", clientNonce, serverNonce)
}

func cookieHash(c Cookie, label string, clientNonce, serverNonce []byte) []byte {
	h := hmac.New(sha256.New, c[:])
	h.Write([]byte(label))
	h.Write(clientNonce)
	h.Write(serverNonce)
	return h.Sum(nil)
}

// AcceptExtended is the Extended ORPort's end of a connection: it proves the cookie
// and has it proved, reads who the client is, and answers OKAY, or DENY when decide
// returns an error, which it returns then. Nothing behind the last command is read.
// Deadlines are the caller's, and so is closing conn.
func AcceptExtended(conn io.ReadWriter, cookie Cookie, decide func(Client) error) (Client, error) {
	var c Client
	if err := acceptCookie(conn, cookie); err != nil {
		return c, fmt.Errorf("the Extended ORPort: %w", err)
	}
	done := false
	for range maxCommands {
		command, body, err := readCommand(conn)
		if err != nil {
			return c, fmt.Errorf("the Extended ORPort: %w", err)
		}
		switch command {
		case cmdUserAddr:
			c.Addr = string(body)
		case cmdTransport:
			c.Transport = string(body)
		case cmdDone:
			done = true
		} // others have no meaning here, and are ignored (PT1-11)
		if done {
			break
		}
	}
	err := fmt.Errorf("the Extended ORPort: %d commands and no DONE (PT1-11)", maxCommands)
	if done {
		err = decide(c)
	}
	answer := uint16(cmdOkay)
	if err != nil {
		answer = cmdDeny
	}
	if _, werr := conn.Write(appendCommand(nil, answer, "")); err == nil && werr != nil {
		err = fmt.Errorf("the Extended ORPort: %w", werr)
	}
	return c, err
}

func acceptCookie(conn io.ReadWriter, cookie Cookie) error {
	if _, err := conn.Write([]byte{authSafeCookie, 0}); err != nil {
		return err
	}
	var method [1]byte
	if _, err := io.ReadFull(conn, method[:]); err != nil {
		return ended(err)
	}
	if method[0] != authSafeCookie {
		return fmt.Errorf("authentication of type %d, which was not offered (PT1-10)", method[0])
	}
	var nonces [2 * nonceSize]byte // the client's, then the server's
	if _, err := io.ReadFull(conn, nonces[:nonceSize]); err != nil {
		return ended(err)
	}
	_, _ = rand.Read(nonces[nonceSize:]) // it never fails
	clientNonce, serverNonce := nonces[:nonceSize], nonces[nonceSize:]
	if _, err := conn.Write(append(serverHash(cookie, clientNonce, serverNonce), serverNonce...)); err != nil {
		return err
	}
	var proof [sha256.Size]byte
	if _, err := io.ReadFull(conn, proof[:]); err != nil {
		return ended(err)
	}
	if !hmac.Equal(proof[:], clientHash(cookie, clientNonce, serverNonce)) {
		_, _ = conn.Write([]byte{0}) // it is refused in any case
		return ErrForged
	}
	_, err := conn.Write([]byte{1})
	return err
}

// ConnectExtended is the transport's end of a connection to an Extended ORPort. When
// it returns nil, conn is the client's stream: nothing behind the answer has been
// read. Deadlines are the caller's, and so is closing conn.
func ConnectExtended(conn io.ReadWriter, cookie Cookie, c Client) error {
	if len(c.Addr) > maxBody || len(c.Transport) > maxBody {
		return fmt.Errorf("the Extended ORPort: the address or the name of the transport has more than %d bytes", maxBody)
	}
	if err := proveCookie(conn, cookie); err != nil {
		return fmt.Errorf("the Extended ORPort: %w", err)
	}
	var b []byte
	if c.Addr != "" {
		b = appendCommand(b, cmdUserAddr, c.Addr)
	}
	if c.Transport != "" {
		b = appendCommand(b, cmdTransport, c.Transport)
	}
	if _, err := conn.Write(appendCommand(b, cmdDone, "")); err != nil {
		return fmt.Errorf("the Extended ORPort: %w", err)
	}
	for range maxCommands {
		command, _, err := readCommand(conn)
		switch {
		case err != nil:
			return fmt.Errorf("the Extended ORPort: %w", err)
		case command == cmdOkay:
			return nil
		case command == cmdDeny:
			return ErrDenied
		}
	}
	return fmt.Errorf("the Extended ORPort: %d commands, and neither OKAY nor DENY (PT1-11)", maxCommands)
}

func proveCookie(conn io.ReadWriter, cookie Cookie) error {
	offered := false
	for n := 0; ; n++ {
		var method [1]byte
		if _, err := io.ReadFull(conn, method[:]); err != nil {
			return ended(err)
		}
		if method[0] == 0 {
			break
		}
		if n == 255 {
			return errors.New("the types of authentication have no end (PT1-10)")
		}
		offered = offered || method[0] == authSafeCookie
	}
	if !offered {
		return errors.New("authentication by cookie is not offered (PT1-10)")
	}
	hello := make([]byte, 1+nonceSize)
	hello[0] = authSafeCookie
	clientNonce := hello[1:]
	_, _ = rand.Read(clientNonce) // it never fails
	if _, err := conn.Write(hello); err != nil {
		return err
	}
	var answer [sha256.Size + nonceSize]byte
	if _, err := io.ReadFull(conn, answer[:]); err != nil {
		return ended(err)
	}
	serverNonce := answer[sha256.Size:]
	if !hmac.Equal(answer[:sha256.Size], serverHash(cookie, clientNonce, serverNonce)) {
		return ErrForged
	}
	if _, err := conn.Write(clientHash(cookie, clientNonce, serverNonce)); err != nil {
		return err
	}
	var status [1]byte
	if _, err := io.ReadFull(conn, status[:]); err != nil {
		return ended(err)
	}
	if status[0] != 1 {
		return ErrDenied
	}
	return nil
}

func appendCommand(b []byte, command uint16, body string) []byte {
	b = binary.BigEndian.AppendUint16(b, command)
	b = binary.BigEndian.AppendUint16(b, uint16(len(body)))
	return append(b, body...)
}

// readCommand reads one command, and of an over-long one only the beginning into
// memory.
func readCommand(r io.Reader) (command uint16, body []byte, err error) {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return 0, nil, ended(err)
	}
	command, size := binary.BigEndian.Uint16(head[:]), int(binary.BigEndian.Uint16(head[2:]))
	if size > maxBody {
		if command == cmdUserAddr || command == cmdTransport {
			return 0, nil, fmt.Errorf("the body of command %d has %d bytes, at most %d make sense (PT1-11)", command, size, maxBody)
		}
		_, err := io.CopyN(io.Discard, r, int64(size))
		return command, nil, ended(err)
	}
	body = make([]byte, size)
	_, err = io.ReadFull(r, body)
	return command, body, ended(err)
}

func ended(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}
