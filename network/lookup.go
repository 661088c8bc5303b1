package network

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// The lists of package-wide sets grow with the VMs of a host. What is new to it is
// looked for by its name or key, at the same cost whether there is one VM or a
// thousand.

// one asks for one thing. there is false when it isn't there, or what it is in.
func (r *rulesReader) one(what uint16, family nftables.TableFamily, attrs []byte) (data []byte, there bool, err error) {
	msgs, err := r.conn.Execute(netlink.Message{
		Header: netlink.Header{Type: netlink.HeaderType(unix.NFNL_SUBSYS_NFTABLES<<8 | what), Flags: netlink.Request},
		Data:   append([]byte{byte(family), unix.NFNETLINK_V0, 0, 0}, attrs...),
	})
	r.read += len(msgs)
	switch {
	case errors.Is(err, unix.ENOENT):
		return nil, false, nil
	case err != nil:
		return nil, false, fmt.Errorf("cannot read the rules: %w", err)
	case len(msgs) != 1 || len(msgs[0].Data) < nfgenmsg:
		return nil, false, fmt.Errorf("cannot read the rules: the kernel answers with %d messages, not one", len(msgs))
	}
	return msgs[0].Data[nfgenmsg:], true, nil
}

// hasChain says whether a table has a chain.
func (r *rulesReader) hasChain(t table, chain string) (bool, error) {
	attrs, err := netlink.MarshalAttributes([]netlink.Attribute{
		nameAttr(unix.NFTA_CHAIN_TABLE, t.name), nameAttr(unix.NFTA_CHAIN_NAME, chain),
	})
	if err != nil {
		return false, err
	}
	_, there, err := r.one(unix.NFT_MSG_GETCHAIN, t.family, attrs)
	return there, err
}

// keyLength is how many bytes the keys of a set have. there is false when there is
// no such set.
func (r *rulesReader) keyLength(t table, set string) (length uint32, there bool, err error) {
	attrs, err := netlink.MarshalAttributes([]netlink.Attribute{
		nameAttr(unix.NFTA_SET_TABLE, t.name), nameAttr(unix.NFTA_SET_NAME, set),
	})
	if err != nil {
		return 0, false, err
	}
	data, there, err := r.one(unix.NFT_MSG_GETSET, t.family, attrs)
	if err != nil || !there {
		return 0, false, err
	}
	err = attributes(data, func(d *netlink.AttributeDecoder) {
		if d.Type() == unix.NFTA_SET_KEY_LEN {
			length = d.Uint32()
		}
	})
	return length, true, err
}

// hasElement says whether a set has an element of this key.
func (r *rulesReader) hasElement(t table, set string, key []byte) (bool, error) {
	e := netlink.NewAttributeEncoder()
	e.ByteOrder = binary.BigEndian
	e.Bytes(unix.NFTA_SET_ELEM_LIST_TABLE, append([]byte(t.name), 0))
	e.Bytes(unix.NFTA_SET_ELEM_LIST_SET, append([]byte(set), 0))
	e.Nested(unix.NFTA_SET_ELEM_LIST_ELEMENTS, func(list *netlink.AttributeEncoder) error {
		list.Nested(unix.NFTA_LIST_ELEM, func(element *netlink.AttributeEncoder) error {
			element.Nested(unix.NFTA_SET_ELEM_KEY, func(value *netlink.AttributeEncoder) error {
				value.Bytes(unix.NFTA_DATA_VALUE, key)
				return nil
			})
			return nil
		})
		return nil
	})
	attrs, err := e.Encode()
	if err != nil {
		return false, err
	}
	_, there, err := r.one(unix.NFT_MSG_GETSETELEM, t.family, attrs)
	return there, err
}

// areNew says that the tables, which are there, have none of a VM's chains and
// elements: then nothing of it can be left from before, as all that a VM has comes
// and goes in one transaction.
func (r *rulesReader) areNew(parts []table) (bool, error) {
	for _, t := range parts {
		for _, c := range t.chains {
			if there, err := r.hasChain(t, c.name); err != nil || there {
				return false, err
			}
		}
		for _, s := range t.sets {
			for _, e := range s.elements {
				if there, err := r.hasElement(t, s.name, e.key); err != nil || there {
					return false, err
				}
			}
		}
	}
	return true, nil
}
