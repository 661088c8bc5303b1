package network

import (
	"encoding/binary"
	"errors"
	"fmt"
	"regexp"
	"strconv"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// rulesReader reads from the kernel what is there of our tables. The library's
// own readers lose the error number, by which "not there" is told from "could
// not look", and don't see that a list was interrupted.
type rulesReader struct {
	conn *netlink.Conn
	read int // messages, so far
}

func openRulesReader() (*rulesReader, error) {
	c, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return nil, fmt.Errorf("cannot open a netfilter socket: %w", err)
	}
	return &rulesReader{conn: c}, nil
}

func (r *rulesReader) close() error { return r.conn.Close() }

// nfgenmsg is how long the header of every nfnetlink message is: family,
// version, resource id.
const nfgenmsg = 4

// get asks for a list. missing means that what it is a list of isn't there.
func (r *rulesReader) get(what uint16, family nftables.TableFamily, attrs ...netlink.Attribute) (msgs []netlink.Message, missing bool, err error) {
	data, err := netlink.MarshalAttributes(attrs)
	if err != nil {
		return nil, false, err
	}
	req := netlink.Message{
		Header: netlink.Header{Type: netlink.HeaderType(unix.NFNL_SUBSYS_NFTABLES<<8 | what), Flags: netlink.Request | netlink.Dump},
		Data:   append([]byte{byte(family), unix.NFNETLINK_V0, 0, 0}, data...),
	}
	for try := 1; ; try++ {
		msgs, err = r.conn.Execute(req)
		r.read += len(msgs)
		switch {
		case errors.Is(err, unix.ENOENT):
			return nil, true, nil
		case errors.Is(err, unix.EINTR) || err == nil && interrupted(msgs):
			if try < dumpTries {
				continue
			}
			return nil, false, errors.New("cannot read the rules: they change all the time")
		case err != nil:
			return nil, false, fmt.Errorf("cannot read the rules: %w", err)
		}
		return msgs, false, nil
	}
}

func interrupted(msgs []netlink.Message) bool {
	for _, m := range msgs {
		if m.Header.Flags&netlink.DumpInterrupted != 0 {
			return true
		}
	}
	return false
}

func nameAttr(typ uint16, name string) netlink.Attribute {
	return netlink.Attribute{Type: typ, Data: append([]byte(name), 0)}
}

// attributes calls each with every attribute of a message's or an attribute's data.
func attributes(data []byte, each func(*netlink.AttributeDecoder)) error {
	d, err := netlink.NewAttributeDecoder(data)
	if err != nil {
		return err
	}
	d.ByteOrder = binary.BigEndian
	for d.Next() {
		each(d)
	}
	return d.Err()
}

// tableVersion is a table of ours, of any layout.
type tableVersion struct {
	family  nftables.TableFamily
	name    string
	version int
}

var tableNames = regexp.MustCompile(`^clawvm_v([0-9]{1,9})_([0-9a-f]{8})$`)

// tables lists the owner's tables.
func (r *rulesReader) tables(owner string) ([]tableVersion, error) {
	msgs, _, err := r.get(unix.NFT_MSG_GETTABLE, nftables.TableFamilyUnspecified)
	if err != nil {
		return nil, err
	}
	var all []tableVersion
	for _, m := range msgs {
		t := tableVersion{}
		if len(m.Data) < nfgenmsg {
			continue
		}
		t.family = nftables.TableFamily(m.Data[0])
		if err := attributes(m.Data[nfgenmsg:], func(d *netlink.AttributeDecoder) {
			if d.Type() == unix.NFTA_TABLE_NAME {
				t.name = d.String()
			}
		}); err != nil {
			return nil, err
		}
		found := tableNames.FindStringSubmatch(t.name)
		if found == nil || found[2] != owner {
			continue
		}
		if t.version, err = strconv.Atoi(found[1]); err != nil {
			return nil, err
		}
		all = append(all, t)
	}
	return all, nil
}

// rules lists the user data of a chain's rules, in their order; none for a chain that isn't there.
func (r *rulesReader) rules(t table, chain string) ([]string, error) {
	msgs, _, err := r.get(unix.NFT_MSG_GETRULE, t.family,
		nameAttr(unix.NFTA_RULE_TABLE, t.name), nameAttr(unix.NFTA_RULE_CHAIN, chain))
	if err != nil {
		return nil, err
	}
	var all []string
	for _, m := range msgs {
		if len(m.Data) < nfgenmsg {
			continue
		}
		data := ""
		if err := attributes(m.Data[nfgenmsg:], func(d *netlink.AttributeDecoder) {
			if d.Type() == unix.NFTA_RULE_USERDATA {
				data = string(d.Bytes())
			}
		}); err != nil {
			return nil, err
		}
		all = append(all, data)
	}
	return all, nil
}

// elements reads a set by its keys. missing says that there is no such set.
func (r *rulesReader) elements(t table, set string) (all map[string]element, missing bool, err error) {
	msgs, missing, err := r.get(unix.NFT_MSG_GETSETELEM, t.family,
		nameAttr(unix.NFTA_SET_ELEM_LIST_TABLE, t.name), nameAttr(unix.NFTA_SET_ELEM_LIST_SET, set))
	if err != nil || missing {
		return nil, missing, err
	}
	all = map[string]element{}
	for _, m := range msgs {
		if len(m.Data) < nfgenmsg {
			continue
		}
		if err := attributes(m.Data[nfgenmsg:], func(d *netlink.AttributeDecoder) {
			if d.Type() != unix.NFTA_SET_ELEM_LIST_ELEMENTS {
				return
			}
			d.Nested(func(list *netlink.AttributeDecoder) error {
				for list.Next() {
					list.Do(func(b []byte) error {
						e, err := parseElement(b)
						all[string(e.key)] = e
						return err
					})
				}
				return nil
			})
		}); err != nil {
			return nil, false, err
		}
	}
	return all, false, nil
}

func parseElement(data []byte) (element, error) {
	var e element
	err := attributes(data, func(d *netlink.AttributeDecoder) {
		kind := d.Type()
		if kind != unix.NFTA_SET_ELEM_KEY && kind != nftables.NFTA_SET_ELEM_KEY_END && kind != unix.NFTA_SET_ELEM_DATA {
			return
		}
		d.Nested(func(v *netlink.AttributeDecoder) error {
			for v.Next() {
				switch {
				case v.Type() == unix.NFTA_DATA_VALUE && kind == unix.NFTA_SET_ELEM_KEY:
					e.key = v.Bytes()
				case v.Type() == unix.NFTA_DATA_VALUE && kind == nftables.NFTA_SET_ELEM_KEY_END:
					e.end = v.Bytes()
				case v.Type() == unix.NFTA_DATA_VALUE:
					e.value = v.Bytes()
				case v.Type() == unix.NFTA_DATA_VERDICT:
					v.Nested(func(w *netlink.AttributeDecoder) error {
						for w.Next() {
							if w.Type() == unix.NFTA_VERDICT_CHAIN {
								e.chain = w.String()
							}
						}
						return nil
					})
				}
			}
			return nil
		})
	})
	return e, err
}

// chains lists the names of a table's chains.
func (r *rulesReader) chains(t table) ([]string, error) {
	msgs, _, err := r.get(unix.NFT_MSG_GETCHAIN, t.family)
	if err != nil {
		return nil, err
	}
	var all []string
	for _, m := range msgs {
		if len(m.Data) < nfgenmsg {
			continue
		}
		inTable, name := "", ""
		if err := attributes(m.Data[nfgenmsg:], func(d *netlink.AttributeDecoder) {
			switch d.Type() {
			case unix.NFTA_CHAIN_TABLE:
				inTable = d.String()
			case unix.NFTA_CHAIN_NAME:
				name = d.String()
			}
		}); err != nil {
			return nil, err
		}
		if inTable == t.name && nftables.TableFamily(m.Data[0]) == t.family {
			all = append(all, name)
		}
	}
	return all, nil
}
